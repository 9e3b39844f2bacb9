"""fdiv beside its peers: time, memory and error, all in one run. `python -m benchmarks.speed --help`."""
