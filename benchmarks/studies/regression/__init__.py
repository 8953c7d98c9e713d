"""How good ELLA's error bars are beside simpler methods, in two regression tasks.

    python -m benchmarks.studies.regression run [--task flights|concrete|all] [options]
    python -m benchmarks.studies.regression report

Every method has the same network, the same mean, and the same validation rows to be tuned on. The seed changes
the split, the network, and ELLA's landmarks and curvature inputs. The report writes docs/regression.md.
"""
