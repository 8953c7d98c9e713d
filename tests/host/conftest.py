collect_ignore = ["stand_in"]  # a package called laplace, of which other processes run the tests
