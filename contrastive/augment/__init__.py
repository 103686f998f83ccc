"""Two random views of every image, batched on the training device; import from the modules."""
