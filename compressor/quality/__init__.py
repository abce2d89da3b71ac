"""Quality of samples, and drift from the dense model."""
