"""The Ray Serve application.

Invariant: whoever imports `ray.serve.llm` in this package can do so with every supported version of vLLM, because the
package itself is imported before, in the replicas too.
"""

from aft_ray.cluster.compat import alias_moved_modules

alias_moved_modules()
