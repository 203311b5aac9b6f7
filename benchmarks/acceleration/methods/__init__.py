"""One file a method; each defines METHOD (see `benchmarks.acceleration.protocol`). A new file is a new row."""
