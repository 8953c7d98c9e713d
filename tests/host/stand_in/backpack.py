raise ModuleNotFoundError("No module named 'backpack'", name="backpack")
