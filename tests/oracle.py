"""The family once more, line by line from the papers, in NumPy with 64 bits and no thought for speed or storage."""

import numpy as np

COMMON = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}


def _adam(o, s, g, t):
    s["m"] = o["b1"] * s.get("m", 0) + (1 - o["b1"]) * g
    s["v"] = o["b2"] * s.get("v", 0) + (1 - o["b2"]) * abs(g) ** 2
    return _mean(o, s["m"], g, t), np.sqrt(s["v"] / (1 - o["b2"] ** t) + o["eps_root"]) + o["eps"]


def _mean(o, m, g, t):
    if o.get("nesterov"):
        return o["b1"] * m / (1 - o["b1"] ** (t + 1)) + (1 - o["b1"]) * g / (1 - o["b1"] ** t)
    return m / (1 - o["b1"] ** t)


def _adamax(o, s, g, t):
    mean, _ = _adam(o, s, g, t)
    s["n"] = np.maximum(o["b2"] * s.get("n", 0), abs(g) + o["eps"])
    return mean, s["n"]


def _amsgrad(o, s, g, t):
    mean, _ = _adam(o, s, g, t)
    s["top"] = np.maximum(s.get("top", 0), s["v"] / (1 - o["b2"] ** t))
    return mean, np.sqrt(s["top"] + o["eps_root"]) + o["eps"]


def _adabelief(o, s, g, t):
    mean, _ = _adam(o, s, g, t)
    s["b"] = o["b2"] * s.get("b", 0) + (1 - o["b2"]) * abs(g - s["m"]) ** 2 + o["eps_root"]
    return mean, np.sqrt(s["b"] / (1 - o["b2"] ** t)) + o["eps"]


def _yogi(o, s, g, t):
    s["m"] = o["b1"] * s.get("m", 1e-6) + (1 - o["b1"]) * g
    v = s.get("v", 1e-6)
    s["v"] = v - (1 - o["b2"]) * np.sign(v - abs(g) ** 2) * abs(g) ** 2
    return s["m"] / (1 - o["b1"] ** t), np.sqrt(s["v"] / (1 - o["b2"] ** t)) + o["eps"]


def _radam(o, s, g, t):
    mean, root = _adam(o, s, g, t)
    last = 2 / (1 - o["b2"]) - 1
    rho = last - 2 * t * o["b2"] ** t / (1 - o["b2"] ** t)
    if rho < o["threshold"]:
        return mean, 1.0
    return mean * np.sqrt((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)), root


def _rmsprop(o, s, g, t):
    s["v"] = o["decay"] * s.get("v", 0) + (1 - o["decay"]) * abs(g) ** 2
    s["m"] = o["decay"] * s.get("m", 0) + (1 - o["decay"]) * g
    v = s["v"] - abs(s["m"]) ** 2 if o["centered"] else s["v"]
    return g, np.sqrt(v + o["eps"]) if o["eps_in_sqrt"] else np.sqrt(v) + o["eps"]


def _lion(o, s, g, t):
    m = s.get("m", 0)
    s["m"] = o["b2"] * m + (1 - o["b2"]) * g
    return np.sign(o["b1"] * m + (1 - o["b1"]) * g), 1.0


def _adopt(o, s, g, t):
    if t == 1:
        s["v"], x = abs(g) ** 2, 0 * g
    else:
        noise = np.maximum(np.sqrt(s["v"]), o["eps"])
        x = g / (np.maximum(noise, abs(g) / (t - 1) ** 0.25) if o["use_clipping"] else noise)
        s["v"] = o["b2"] * s["v"] + (1 - o["b2"]) * abs(g) ** 2
    s["m"] = o["b1"] * s.get("m", 0) + (1 - o["b1"]) * x
    return o["b1"] * s["m"] + (1 - o["b1"]) * x if o["nesterov"] else s["m"], 1.0


def _ademamix(o, s, g, t):
    mean, root = _adam(o, s, g, t)
    s["slow"] = o["b3"] * s.get("slow", 0) + (1 - o["b3"]) * g
    return mean + o["alpha"] * s["slow"], root


def _centered_adam(o, s, g, t):
    return _adam({**COMMON, "b1": o["b"], "b2": o["b"], "eps": o["eps"]}, s, g, t)


# name -> signal and noise of one array after gradient t; `s` is its memory
FAMILY = {
    **dict.fromkeys(("adam", "adamw", "nadam", "nadamw", "lamb"), _adam),
    **dict.fromkeys(("adamax", "adamaxw"), _adamax),
    "amsgrad": _amsgrad,
    "adabelief": _adabelief,
    "yogi": _yogi,
    "radam": _radam,
    "rmsprop": _rmsprop,
    "lion": _lion,
    "adopt": _adopt,
    "ademamix": _ademamix,
    "centered_adam": _centered_adam,
}


def updates(name, options, alpha, weight_decay, p, gradients):
    """The update of one array at every step, for constant parameters; alpha is a function of the steps taken."""
    wide = np.complex128 if np.iscomplexobj(p) else np.float64
    p, memory, found = p.astype(wide), {}, []
    for t, g in enumerate(gradients, 1):
        signal, noise = FAMILY[name](options, memory, g.astype(wide), t)
        u = signal / noise + weight_decay * p
        if name == "lamb":
            sizes = np.linalg.norm(np.ravel(p)), np.linalg.norm(np.ravel(u))
            u = u * (sizes[0] / sizes[1] if min(sizes) > 0 else 1.0)
        found.append(-alpha(t - 1) * u)
    return found
