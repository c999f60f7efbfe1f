"""Lesson 3 for teachers: typical wrong answers, bugs to plant, and questions for an exam."""

from course.lessons import Fault, Wrong

OPTIM = "tinyfm/training/optim.py"
TRAINER = "tinyfm/training/trainer.py"

WRONG = {
    "shuffle": (
        Wrong("(seed, int(epoch))", "(seed, 0)", "each epoch has another order"),
        Wrong("(seed, int(epoch))", "(int(epoch), 0)", "the seed counts"),
        Wrong(
            "permute(samples[here] % size, size, keys)",
            "np.random.default_rng(keys).permutation(samples[here] % size)",
            "the order does not depend on which samples are asked for",
        ),
        Wrong("rows[here] =", "rows =", "the samples may lie in several epochs"),
    ),
    "weighted": (
        Wrong('metrics.get("weight", rows)', "rows", "the loss is a mean over targets, not rows"),
        Wrong('metrics.get("weight", rows)', 'metrics.get("weight", 1)', "without a weight: rows"),
        Wrong("loss * weight, weight", "loss, weight", "means of parts do not add up"),
        Wrong("loss * weight, weight", "loss / weight, weight", "a sum is the mean times n"),
    ),
    "Trainer.backward": (
        Wrong(
            "        loss.backward()",
            "        (loss / len(micro_batches)).backward()",
            "the division by the whole weight comes later, once",
        ),
        Wrong(
            "loss, weight = weighted(loss, metrics, len(rows))\n        loss.backward()",
            "loss.backward()\n        loss, weight = weighted(loss, metrics, len(rows))",
            "gradients are those of loss * weight",
        ),
        Wrong("sums += torch", "sums = torch", "the sums are over all micro-batches"),
        Wrong("slice(rows.start, rows.stop)", "slice(None)", "each row is read once"),
        Wrong("step, rows)", "step, range(len(rows)))", "a generator belongs to a row"),
        Wrong("last=rows is micro_batches[-1]", "last=True", "one exchange a step"),
        Wrong("loss.detach()", "loss", "the sums have no graph"),
    ),
    "lr_factor": (
        Wrong("(step + 1) / config", "step / config", "the first step has a rate above 0"),
        Wrong("(step - config.warmup_steps)", "step", "the wave begins when the warmup ends"),
        Wrong("(1 + math.cos", "(1 - math.cos", "the rate falls"),
        Wrong("left = steps - step", "left = steps - step - 1", "it ends at `steps`"),
        Wrong(", steps - config.warmup_steps)  #", ", steps)  #", "no fall before the warmup ends"),
        Wrong(
            "config.final_lr + (1 - config.final_lr) * share",
            "max(config.final_lr, share)",
            "the whole fall is shrunk to the range from 1 to final_lr",
        ),
        Wrong(
            "config.final_lr + (1 - config.final_lr) * share",
            "config.final_lr + share",
            "the peak stays 1",
        ),
    ),
    "scale_and_clip": (
        Wrong(
            "torch.clamp(clip / (norm + 1e-6), max=1.0)", "clip / (norm + 1e-6)", "never stretch"
        ),
        Wrong("total_norm(grads) * scale", "total_norm(grads)", "the norm is that after scaling"),
        Wrong("factor = scale * torch", "factor = torch", "clipped gradients are scaled too"),
        Wrong("if clip > 0", "if clip >= 0", "0 turns clipping off"),
        Wrong("total_norm(grads)", "max(g.norm() for g in grads)", "one norm of all together"),
    ),
    "hidden_matrices": (
        Wrong("p.ndim in ndims", "p.ndim >= 2", "kernels only if asked for"),
        Wrong("p.ndim in ndims and ", "", "gains and biases are vectors"),
        Wrong('outer.isdisjoint(name.split("."))', "name not in outer", "a name is a path"),
        Wrong(
            'outer.isdisjoint(name.split("."))',
            "not any(part in name for part in outer)",
            "a part of the path is equal to a name, it does not contain it",
        ),
        Wrong('outer.isdisjoint(name.split("."))', 'name.split(".")[0] not in outer', "any depth"),
    ),
    "orthogonalise": (
        Wrong("X.norm(dim=(1, 2), keepdim=True)", "X.norm()", "each matrix has its own norm"),
        Wrong("beta=b, alpha=c", "beta=c, alpha=b", "b goes with A, c with A A"),
        Wrong("X.mT if tall else X", "X", "a tall matrix comes back tall"),
        Wrong("beta=a)", "beta=1.0)", "the first coefficient is a"),
        Wrong("range(steps)", "range(steps - 1)", "as many steps as asked for"),
        Wrong(".clamp(min=1e-7)", "", "zeros stay zeros"),
    ),
    "EMA.update": (
        Wrong("1 - decay)", "decay)", "the share of the new is 1 - decay"),
        Wrong("min(0.5", "max(0.5", "the smaller decay counts"),
        Wrong("0.5 ** (1 / self.half_life)", "1 - 1 / self.half_life", "2^(-1 / half_life)"),
        Wrong("(1 + step) / (10 + step)", "1.0", "the first steps forget faster"),
    ),
}

FAULTS = (
    Fault(
        TRAINER,
        "Trainer.evaluate",
        "self.model.eval()",
        "self.model.train()",
        "With --model.dropout 0.3 the validation loss that a run prints is above the one that a "
        "script finds which loads the same checkpoint, calls model.eval() and computes the loss of "
        "the same text. Without dropout the two agree.",
        "The model is evaluated in training mode, so dropout is on. Found by printing "
        "model.training inside the loss while the trainer evaluates.",
    ),
    Fault(
        OPTIM,
        "EMA.swap",
        "average.copy_(kept)",
        "average.copy_(average)",
        "With --optim.ema-half-life 100 the training loss depends on --train.eval-every: a run "
        "that is evaluated every 10 steps learns more slowly than one evaluated at its end.",
        "swap gives the model the average, but does not keep the model's weights. The second swap, "
        "after the evaluation, then cannot give them back: training continues from the average. "
        "Found by comparing the weights before and after an evaluation.",
    ),
    Fault(
        TRAINER,
        "Trainer.update",
        "self.world.size / weight",
        "self.world.size",
        "The losses of a run look normal, but grad_norm in metrics.jsonl is in the hundreds or "
        "thousands, and it doubles when --train.batch-size is doubled.",
        "The sum of the gradients is never divided by the total weight, so it grows with the "
        "batch, and clipping to 1 acts in each step. Found by comparing the norm with that of "
        "torch.autograd.grad of the mean loss of one batch.",
    ),
    Fault(
        "tinyfm/batches/order.py",
        "shuffle",
        "(seed, int(epoch))",
        "(seed, 0)",
        "Training and validation losses look normal. But on a small text the training loss "
        "repeats the same ups and downs again and again, with a period of one epoch.",
        "The keys of the permutation do not depend on the epoch, so all epochs have the same "
        "order. Found by printing the first rows of two epochs.",
    ),
)

QUESTIONS = [
    (
        "A batch is cut into micro-batches of 10 and 30 targets with the mean losses 2 and 3. What "
        "is the loss of the batch? What does a program report that averages the two means, and "
        "what does it do wrong beyond the report?",
        "(2 * 10 + 3 * 30) / 40 = 2.75. It reports 2.5. Its gradient is wrong too: each target of "
        "the small micro-batch counts three times as much as one of the large.",
    ),
    (
        "Adam's first step, without weight decay: show that it has the size lr for each weight, "
        "whatever the gradient. What follows for clipping in the first step?",
        "m = (1 - b1) g and v = (1 - b2) g^2; corrected for the start they are g and g^2, so the "
        "step is lr g / |g| = lr sign(g). It does not depend on the size of g, so clipping changes "
        "nothing in it. Later it matters, as averages mix gradients of several steps.",
    ),
    (
        "Why does Muon divide a matrix by its Frobenius norm before Newton-Schulz? Why not by the "
        "largest singular value?",
        "The polynomial leads values in (0, 1] to about 1, and larger ones away. The Frobenius "
        "norm, the root of the sum of the squared singular values, is at least the largest of "
        "them, and costs one pass. The largest singular value itself would need a decomposition.",
    ),
    (
        "What has to be saved so that a stopped run continues bit for bit? Why are the position in "
        "the data and the state of the random generators not in this repository's checkpoints?",
        "Weights, the optimizers' averages, the moving average, the number of the step and the "
        "guard's memory. Order and random numbers are functions of (seed, step, row), so the step "
        "is enough.",
    ),
    (
        "Gradients (3, 4), clip 1. What are they after clipping by the norm of all, and after "
        "clipping each on its own? What is lost in the second case?",
        "(0.6, 0.8), and (1, 1). The direction is lost: the second is no longer a multiple of the "
        "gradient.",
    ),
    (
        "A moving average has a half-life of 50 steps. What is its decay? How much weight have the "
        "last 100 steps together?",
        "2^(-1/50) = 0.986. What is older than 100 steps has (1/2)^2 = 1/4, so the last 100 have "
        "3/4.",
    ),
    (
        "A run with a constant rate and one whose rate falls at the end have seen the same data. "
        "Why is the second usually better, and why is it wrong to conclude that a small rate from "
        "the start would be best?",
        "Each step has noise in proportion to the rate, and a small rate at the end averages it "
        "out. A small rate from the start moves too little in the given steps. An average of the "
        "weights has much the same effect as the fall.",
    ),
]
