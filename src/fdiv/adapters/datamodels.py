"""Datamodels by scikit-learn: linear regressions of models' outputs on what the models were trained on.

Ilyas, Park, Engstrom, Leclerc and Madry, "Datamodels: Predicting Predictions from Training Data",
arXiv 2202.00622.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

try:
    from sklearn.linear_model import LassoCV, RidgeCV
except ImportError as error:
    raise ImportError('this needs scikit-learn: pip install "fdiv[scikit]"') from error

from fdiv.methods.unlearn.datamodel_matching import Datamodels

STRENGTHS = tuple(10.0**k for k in range(-3, 5))  # of the ridge, to choose among


def fit_datamodels(
    included: Tensor, outputs: Tensor, penalty: Literal["ridge", "lasso"] = "ridge"
) -> Datamodels:
    """Least squares of outputs [models, ...] on included [models, training], true where it was trained on.

    "ridge": of one strength for all outputs, the best for models that are left out one by one. "lasso", which
    takes much longer: of a strength for each output, the best in five-fold cross-validation.
    """
    if len(included) != len(outputs) or len(included) < 2:
        raise ValueError(
            f"included is [models >= 2, training] and outputs [models, ...], got {tuple(included.shape)} and "
            f"{tuple(outputs.shape)}"
        )
    x, y = (t.double().reshape(len(t), -1).numpy(force=True) for t in (included, outputs))
    if penalty == "ridge":
        fit = RidgeCV(alphas=STRENGTHS).fit(x, y)
        coefficients = np.asarray(fit.coef_).reshape(y.shape[1], x.shape[1]), np.ravel(fit.intercept_)
    elif penalty == "lasso":
        fits = [LassoCV(cv=5).fit(x, column) for column in y.T]
        coefficients = np.stack([fit.coef_ for fit in fits]), np.array([fit.intercept_ for fit in fits])
    else:
        raise ValueError(f"penalty is 'ridge' or 'lasso', got {penalty!r}")
    weights, bias = (torch.from_numpy(np.ascontiguousarray(c.T)).to(outputs) for c in coefficients)
    return Datamodels(weights.reshape(-1, *outputs.shape[1:]), bias.reshape(outputs.shape[1:]))
