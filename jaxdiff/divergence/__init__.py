"""The trace of a Jacobian, exactly or by random probes, example by example.

    exact        tr J = sum_i e_i . J e_i                                     d products
    hutchinson   tr J = E[v . J v],   E[v v^T] = I                            one product a probe
    hutchpp      tr J = tr(Q^T J Q) + E[v . J v],   E[v v^T] = I - Q Q^T      two a column of Q, one a probe

The functions whose Jacobian is meant act on a batch, example by example: one product of the batch is a product of every
example's own Jacobian. `hutchinson` takes probes in an orthonormal basis, and a control variate from the covariance of
the data; which of them pays depends on the data: `likelihood.pilot` measures it.
"""

from jaxdiff.divergence.bases import pca_basis as pca_basis
from jaxdiff.divergence.control import GaussianControl as GaussianControl
from jaxdiff.divergence.control import gaussian_control as gaussian_control
from jaxdiff.divergence.estimator import Divergence as Divergence
from jaxdiff.divergence.exact import EXACT_UP_TO as EXACT_UP_TO
from jaxdiff.divergence.exact import exact as exact
from jaxdiff.divergence.hutchinson import default as default
from jaxdiff.divergence.hutchinson import hutchinson as hutchinson
from jaxdiff.divergence.hutchpp import hutchpp as hutchpp
