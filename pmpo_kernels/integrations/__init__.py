"""The loss inside trainers; each module imports its trainer and nothing else does."""
