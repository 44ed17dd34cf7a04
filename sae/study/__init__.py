"""Runs on disk, and the stages that make them: train, harvest, align, sweep, import.

In: settings. Out: files under ``eval_runs/``, each whole or absent, so that every stage resumes.
Must not import: autointerp.
"""
