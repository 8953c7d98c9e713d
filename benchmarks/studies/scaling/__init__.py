"""What a fit costs on several processes: one process is measured, and the rest is worked out.

    python -m benchmarks.studies.scaling run --measure [--device cpu|cuda] [--clock wall|processor] [options]
    python -m benchmarks.studies.scaling run [--within 300] [--between 25] [--latency 50] [options]
    python -m benchmarks.studies.scaling report

With --measure: seconds of one process, for ResNet-50 and ViT-B/16. Without: a model of a fit on 1 to 64 GPUs,
from what was measured and from what is assumed of GPUs and links. The report writes docs/scaling.md.
"""
