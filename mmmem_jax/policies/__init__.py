"""The learned manager and every fixed rule it is compared with, behind one signature.

A policy is `decide_fn(params, noise, state, item) -> ManagerOutput`.
"""
