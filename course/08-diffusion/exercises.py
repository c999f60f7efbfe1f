from course.lessons import Exercise

TITLE = "Diffusion and flow matching"
NEEDS = (6,)
MODULE = "tinyfm/ddpm.py"
EXERCISES = (
    Exercise("q_sample", MODULE, 1, "One line: the equation at the top of the module."),
    Exercise(
        "cosine_betas",
        MODULE,
        1,
        "Compute alpha_bar at S + 1 points in float64; a beta is a ratio of neighbours.",
    ),
    Exercise(
        "separate",
        MODULE,
        2,
        "Two equations with the unknowns x_0 and eps. Cramer's rule divides by one determinant, "
        "alpha b - sigma a.",
    ),
    Exercise(
        "min_snr_weight",
        MODULE,
        2,
        "First the capped SNR; then what turns the error of y into the error of x_0.",
    ),
    Exercise(
        "ddim",
        MODULE,
        2,
        "Loop over pairwise(path). Call noise() only if fresh is above 0; yield x in the loop.",
    ),
    Exercise(
        "heun",
        MODULE,
        2,
        "In time t = sigma the velocity is (x - x_0) / sigma. Take Euler's step, look at the "
        "velocity there, and step again from the start with the mean of both.",
    ),
    Exercise(
        "ddpm",
        MODULE,
        3,
        "The page derives mean and variance of the step back, in the same letters: kept, added.",
    ),
)
