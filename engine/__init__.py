"""The engine: text in and out (client), integers (scheduling), tensors (execution, models)."""
