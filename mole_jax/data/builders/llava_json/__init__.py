"""LLaVA's JSON and its relatives: read, checked, every record accounted for."""
