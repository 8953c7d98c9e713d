"""The paper's settings on the original data, or on CIFAR-10 (JPEG).

    python -m benchmarks.studies.paper run --cifar-root PATH [--network resnet20|resnet32|resnet44|resnet56|all] [options]
    python -m benchmarks.studies.paper run --imagenet-root PATH
        [--network resnet18|resnet34|resnet50|vit_base_patch16_224|all] [options]
    python -m benchmarks.studies.paper run --data PATH [options]
    python -m benchmarks.studies.paper report

M = 2000 balanced landmarks, K = 20, the prior of the paper. Every method is tuned twice: on training images held
out and cropped, as the authors' code does, and on a part of the test images. The report writes docs/paper.md.
"""
