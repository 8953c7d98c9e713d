"""What is left to choose: the method, the number of directions, and T where there are no validation data.

    python -m benchmarks.studies.choice run [--case fashion-cnn|fashion-vit|mnist-cnn|cifar10-jpeg|all] [options]
    python -m benchmarks.studies.choice report

The networks and images are those of the study of quality, with seeds that no rule was made on. Features along 200 directions
are computed once for a network and a seed; everything else is made of them, through the package's own interface. The
report writes tables of docs/evidence.md, docs/ablations.md and docs/choosing.md.
"""
