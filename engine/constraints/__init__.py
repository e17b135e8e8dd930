"""Structured output before it reaches the model: what users may ask for, checked and compiled in a killable child.

Torch-free. The matchers that follow an output token by token are `engine.execution.constraints`.
"""
