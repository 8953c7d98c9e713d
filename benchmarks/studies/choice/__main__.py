from benchmarks.studies.common.start import start

start(__package__)
