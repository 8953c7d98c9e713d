"""How probabilities keep up when test images are corrupted or of another kind.

    python -m benchmarks.studies.shift run [--case fashion-cnn|cifar10-jpeg|all] [options]
    python -m benchmarks.studies.shift report

Every method is tuned once, on clean validation images, as in the study of quality. It is then scored on corrupted
copies of the same test images, and on test images mixed with images of other data sets, which have no right answer.
The report writes docs/robustness.md.
"""
