"""How good ELLA's probabilities are beside simpler methods, on real images.

    python -m benchmarks.studies.quality run [--case fashion-cnn|fashion-vit|mnist-cnn|cifar10-jpeg|all] [options]
    python -m benchmarks.studies.quality report

Every method is tuned on the same validation images, which the network was not fitted to, and scored on
test images. The seed changes the split, ELLA's landmarks and curvature inputs, and the network where it
is trained here. The report writes docs/evidence.md, the comparison of docs/when_not.md, and the figure of README.md.
"""
