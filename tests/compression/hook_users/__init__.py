"""Miniatures of systems that act while layers attend, written as plug-in policies, and proofs that the hooks carry
them. They are tests of the hooks: no product, registered only while these tests run.
"""
