"""From files to batches: sources, their order, the mixture, and the loader's workers."""
