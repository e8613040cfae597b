"""What `pmpo-kernels bench` and the programs in benchmarks/ share: inputs, variants, accuracy, time, memory, report."""
