"""What M, K, n, the prior, the temperature and the draw of landmarks do to quality and cost.

    python -m benchmarks.studies.ablations run [--part error|quality|cost|landmarks] [options]
    python -m benchmarks.studies.ablations report

error: the kernel and the predictive covariance against exact linearised Laplace. quality: NLL and ECE of two
networks. cost: seconds and memory, and their exponents. landmarks: ways to choose them. Without --part, all of them. The report writes
docs/ablations.md and the figures of it and of docs/choosing.md.
"""
