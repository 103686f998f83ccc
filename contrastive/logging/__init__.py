"""Log a run while it trains: metrics.csv, Weights & Biases, throughput."""
