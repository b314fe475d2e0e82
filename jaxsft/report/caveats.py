"""What must be known to read the numbers of others beside ours.

In: the columns of a file of metrics. Out: sentences about that run.

What they say of transformers' Trainer and of TRL was read in their source (5.23 and 1.16), of W&B in its documentation
and client (0.31).
"""

from collections.abc import Sequence

MEAN_OF_STEPS = (
    "its loss is the mean over the {steps} since the line before, each counting the same however many tokens it "
    "trained; in jaxsft it is over all trained tokens of those steps"
)
LAST_STEP = "its grad_norm is that of the last step of each line; in jaxsft it is the mean over the steps of the line"
MICROBATCHES = (
    "within a step its loss is the mean over the trained tokens of all microbatches only if Trainer knew their number "
    "(num_items_in_batch, transformers 4.46 and later, models that take it); else it is a mean of the microbatches' "
    "means, and some releases of that time logged it times gradient_accumulation_steps"
)
FILTERED = "a loss that is not finite does not show: Trainer logs a mean in its place (logging_nan_inf_filter)"
EVAL_LOSS = (
    "its eval_loss is the mean over examples of the loss of their batch, not over trained tokens: it changes with "
    "per_device_eval_batch_size"
)
NUM_TOKENS = "its tokens are TRL's num_tokens: prompts too, padding not, all processes; trained ones are not counted"
INPUT_TOKENS = (
    "its tokens are Trainer's num_input_tokens_seen: prompts too, and padding unless include_num_input_tokens_seen is "
    "non_padding; trained ones are not counted"
)
WHOLE_TIME = (
    "its speed is over the time from start to end that Trainer gives, evaluations and saves included; of a continued "
    "run that time is of its last part only, so the speed is too high"
)
ACCURACY = "its accuracy is the mean of the microbatches' accuracies"

TENSORBOARD = ("TensorBoard keeps numbers in single precision",)

SAMPLED = (
    "W&B samples what it exports: at most 1,000 points of a line in a chart and 500 by `run.history()`, others at each "
    "export; steps between them are missing"
)
BUCKETS = "its points stand for several steps each (their __MIN and __MAX differ): the chart was smoothed or sampled"
LOGGED = "its steps are W&B's own `_step`, which counts calls of the logger; that is an update only if each was logged"
MEANING = "what its loss is a mean over, and which tokens it counts, is not in the file"


def trainer_caveats(columns: Sequence[str], *, logging_steps: int | None) -> tuple[str, ...]:
    """What Trainer's and TRL's columns mean, under whatever prefix a logger gave them.

    Args:
        columns: such as `num_tokens` or `train/num_tokens`.
        logging_steps: steps per line, None where the file does not say.
    """
    names = {column.replace("eval/", "eval_").rpartition("/")[2] for column in columns}
    caveats = [MICROBATCHES, FILTERED]
    if logging_steps != 1:
        steps = "steps" if logging_steps is None else f"{logging_steps} steps"
        caveats = [MEAN_OF_STEPS.format(steps=steps), LAST_STEP, *caveats]
    if "eval_loss" in names:
        caveats.append(EVAL_LOSS)
    if "mean_token_accuracy" in names:
        caveats.append(ACCURACY)
    if "num_tokens" in names:
        caveats.append(NUM_TOKENS)
    elif "num_input_tokens_seen" in names:
        caveats.append(INPUT_TOKENS)
    return tuple(caveats)
