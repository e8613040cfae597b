"""The command line: `pmpo-kernels info | verify | bench`, one file a command."""
