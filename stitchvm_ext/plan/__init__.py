"""What a method will cost before anything is downloaded: counted on fake tensors from the true architectures."""
