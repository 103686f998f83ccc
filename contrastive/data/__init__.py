"""Which images there are, who sees them when, and how they reach the device. Import the rooms directly."""
