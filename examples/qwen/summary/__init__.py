"""What summarize.py is made of: tasks, the exam that backends take, its marks, and the figures as table and chart.

Knows neither flags nor what a backend runs.
"""
