"""`python -m pmpo_kernels` is the command `pmpo-kernels`."""

from pmpo_kernels.cli.app import main

if __name__ == "__main__":
    main()
