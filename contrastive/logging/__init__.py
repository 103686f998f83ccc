"""What a run says while it trains: metrics.csv, Weights & Biases, throughput, the progress bar."""
