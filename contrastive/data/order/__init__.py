"""Orders in which an epoch goes through the data, one a file; ``data.order`` names one."""
