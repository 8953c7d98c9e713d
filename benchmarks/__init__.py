"""What the package costs. benchmarks/README.md says what is measured, and how."""
