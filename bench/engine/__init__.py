"""The worker alone, beside mlx-lm on the same weights: `python -m bench.engine --model demo:smollm2`.

It does not know HTTP or scheduling: it builds StepPlans itself and hands them to the Runner, one step in
flight, as the worker does. Compared with, in the same run and turn by turn:

- raw: mlx-lm's model over its BatchKVCache and an argmax, one step in flight: the least a step can cost.
- mlx-lm: mlx-lm's BatchGenerator, greedy.

Caches start filled with zeros to the wanted context (a step costs the same whatever they hold), so no time
goes into prompts. Figures are medians over all measured steps.
"""
