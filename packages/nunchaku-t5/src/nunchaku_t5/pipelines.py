"""stub for wiring"""
