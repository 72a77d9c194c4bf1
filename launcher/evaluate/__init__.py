"""What a model's answers and losses are worth. Needs no process group: `slipway evaluate` works on a plain folder.

generate.generate_answers(model, prompts, tokenizer, settings, seed, device) -> [Answer(text, cut)] in their order
metrics.score(names, answers, references) -> {metric: number, or nested numbers}, as a record `answers` has them
metrics.correct(names, answer, reference) -> whether one answer is right
metrics.classes.class_figures(predicted, truth, labels) -> accuracy, precision, recall, F1; by scikit-learn
slices.score_slices({column: [value of each row]}, score of some rows) -> the same by values, with the gap
answers.scored(rows, answers, names) -> (the figures of a record `answers`, the lines of answers-<step>.jsonl)
value.value_of(metric, evaluated, answered) -> the number that `evaluate.metric` names in the two records
"""
