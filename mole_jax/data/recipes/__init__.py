"""Published data sets: one file a set, what it is and what its entries mean."""
