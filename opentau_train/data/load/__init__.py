"""The loader's workers: windows in their order become samples, samples become batches."""
