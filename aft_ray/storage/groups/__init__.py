"""The groups of a round in storage: Parquet files, what the ledger knows of them, and tables of questions."""
