raise ModuleNotFoundError("No module named 'asdl'", name="asdl")
