"""Orders in which an epoch visits the images, one per file; ``data.order`` names one."""
