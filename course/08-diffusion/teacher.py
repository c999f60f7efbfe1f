"""For teachers: wrong answers that the checks must find, bugs to plant, and exam questions."""

from course.lessons import Fault, Wrong

WRONG = {
    "q_sample": (
        Wrong("alpha * x0 + sigma * eps", "sigma * x0 + alpha * eps", "image and noise swapped"),
        Wrong("alpha * x0", "alpha**2 * x0", "alpha_bar where its root belongs"),
        Wrong("sigma * eps", "sigma**2 * eps", "the variance where the deviation belongs"),
        Wrong("sigma * eps", "(1 - alpha) * eps", "the variance is not kept"),
    ),
    "cosine_betas": (
        Wrong(".square()", "", "cos instead of cos^2"),
        Wrong("S + 1", "S", "S points have only S - 1 ratios"),
        Wrong("alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[:-1] / alpha_bar[1:]", "ratio inverted"),
        Wrong(".clamp(max=0.999)", "", "the last step leaves no signal"),
        Wrong(", dtype=torch.float64", "", "float32"),
    ),
    "separate": (
        Wrong("b * x_t - sigma * y", "b * x_t + sigma * y", "a sign in Cramer's rule"),
        Wrong("alpha * y - a * x_t", "alpha * y + a * x_t", "a sign in Cramer's rule"),
        Wrong("alpha * b - sigma * a", "alpha * b + sigma * a", "a sign in the determinant"),
        Wrong("alpha * b - sigma * a", "1", "right for v and flow only"),
    ),
    "min_snr_weight": (
        Wrong("snr.clamp(max=gamma)", "snr", "no cap"),
        Wrong("snr.clamp(max=gamma)", "snr.clamp(min=gamma)", "a floor instead of a cap"),
        Wrong('"eps": 1 / snr', '"eps": snr', "the error of x_0 is the error of eps / SNR"),
        Wrong("1 / (snr + 1)", "1 / snr + 1", "brackets"),
    ),
    "ddim": (
        Wrong("alpha_next * x0", "alpha * x0", "mixed again at the old level"),
        Wrong("sigma_next**2 - fresh**2", "sigma_next**2", "new noise on top of the old: too much"),
        Wrong("eta * sigma_next / sigma * ", "eta * ", "the noise of variance large"),
        Wrong("* math.sqrt(added)", "* added", "a variance where its root belongs"),
        Wrong("\n    yield x", "\nyield x", "only the end is a state"),
    ),
    "heun": (
        Wrong("/ sigma_next) / 2", "/ sigma_next)", "the sum of two velocities, not their mean"),
        Wrong("denoise(arrived, t_next", "denoise(x, t_next", "looks at the start twice"),
        Wrong("denoise(arrived, t_next", "denoise(arrived, t", "tells the network the old level"),
        Wrong("x = x + (sigma_next", "x = x - (sigma_next", "walks towards noise"),
        Wrong("if sigma_next > 0:", "if True:", "divides by 0 in the last step"),
    ),
    "ddpm": (
        Wrong("kept * sigma_next**2 * x", "sigma_next**2 * x", "x is not scaled to the next level"),
        Wrong("alpha_next * added", "alpha * added", "alpha of the wrong level"),
        Wrong("sigma**2 - (kept * sigma_next) ** 2", "sigma**2 - sigma_next**2",
              "forgets that the step also shrinks the noise"),
        Wrong("if sigma_next > 0:", "if True:", "noise in the last step"),
        Wrong("math.sqrt(added)", "added", "variance instead of deviation"),
    ),
}  # fmt: skip

FAULTS = (
    Fault(
        "tinyfm/ddpm.py",
        "level",
        "(1 - alpha_bar).sqrt()",
        "1 - alpha_bar",
        "Training runs, and its loss falls. But samples of every sampler are poor, and a picture "
        "of pure standard normal noise, noised to the middle level, has a variance below 1.",
        "sigma is 1 - alpha_bar where it should be its root, so alpha^2 + sigma^2 is below 1 in "
        "training; the samplers' path has the right sigma, and the network never saw such inputs.",
    ),
    Fault(
        "tinyfm/ddpm.py",
        "timesteps",
        "round(S - i * (S / steps)) - 1",
        "round(S - (i + 1) * (S / steps))",
        "With 500 steps the samples are good. With 4 steps of the same model they are pale or "
        "washed out, and their mean brightness is always the same.",
        "The sampler starts at level S - S / steps instead of S - 1, but with pure noise: it "
        "tells the network that a quarter of the picture is there already. With many steps the "
        "two levels are nearly equal. Published samplers had this flaw for years (Lin et al. "
        "2024).",
    ),
    Fault(
        "tinyfm/ddpm.py",
        "dpm",
        "h / h_before / 2",
        "h / h_before",
        "dpm++ is no better than DDIM: with twice the steps its error is halved, not quartered.",
        "The extrapolation goes to the end of the step. For second order it must stand for the "
        "mean of x_0 over the step, which is at its middle: half of the change.",
    ),
    Fault(
        "tinyfm/ddpm.py",
        "Diffusion.sample",
        "with evaluation_mode(self):",
        "with torch.no_grad():",
        "A model that was trained with dropout gives two different pictures from the same seed.",
        "The model stays in training mode while it samples, so dropout removes other activations "
        "in each call, and adds noise that nobody asked for.",
    ),
)

QUESTIONS = [
    (
        "Why can training jump to any level t in one step, while sampling walks through many?",
        "The forward process is Gaussian and known, so x_t given x_0 has a closed form. The way "
        "back needs q(x_s | x_t), which depends on the unknown data; only small steps of it are "
        "nearly Gaussian.",
    ),
    (
        "A network predicts eps perfectly on average. Why is its estimate of x_0 at high noise "
        "a blur?",
        "The best estimate under a squared error is the mean of all x_0 that could have led to "
        "x_t; at high noise these are many pictures.",
    ),
    (
        "Derive the factor between the squared errors of x_0 and of eps at one level.",
        "x_t is given, so eps = (x_t - alpha x_0) / sigma, and an error d of x_0 is one of "
        "alpha d / sigma of eps: the factor is SNR = alpha^2 / sigma^2.",
    ),
    (
        "What is wrong with predicting eps at the very last level, where alpha is nearly 0?",
        "x_t is nearly eps itself, so the task is trivial, and x_0 = (x_t - sigma eps) / alpha "
        "multiplies the error by 1 / alpha. v or flow have determinant 1.",
    ),
    (
        "DDIM and DDPM use the same network. Name one use for which only DDIM (eta 0) will do.",
        "Anything that needs the picture to be a function of its noise: to interpolate between two "
        "noises, to invert a picture, to compare step counts on the same picture.",
    ),
    (
        "A denoiser has the least possible training loss. Why is it useless?",
        "It is the weighted mean of the training pictures, and its samples are copies of them. "
        "What makes new pictures is that the network cannot, and in limited training does not, "
        "reach it.",
    ),
]
