"""The command line: `pmpo-kernels info | verify | bench | demo`, one file a command."""
