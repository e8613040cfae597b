"""The loss inside trainers. Each module imports its trainer, and the rest of the package imports none of these modules."""
