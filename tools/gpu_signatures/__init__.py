"""Compares the packages that this environment has with those that a GPU installation gets, without importing them.

`package_tree` finds names in source files, `touched` finds what our sources and Ray's serve code use of a package,
`listed` names what no source shows, and `comparison` says for each of them what differs between the two builds.
"""
