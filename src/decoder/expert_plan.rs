//! The plan of all that is done with a layer's experts, for one token or many.

use super::experts::ExpertTensors;
use super::norms::Norms;
use super::scratch::Scratch;
use super::weights::NormTensors;
use crate::Result;
use crate::gpu::Pass;
use crate::kernels::experts::{Ends, ExpertRows, Experts, Gated};
use crate::kernels::norm::Norm;
use crate::kernels::route::Route;

/// Tokens through their experts, from the residual stream and onto it.
pub(super) struct ExpertsPlan {
    norm: Option<Norm>,
    route: Route,
    gate_up: Experts,
    down: Experts,
}

impl ExpertsPlan {
    /// For as many tokens as the scratch has room for; `norm` is that of what enters.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu) where the driver refuses a kernel.
    pub fn plan(norms: Norms, norm: Option<&NormTensors>, experts: &ExpertTensors) -> Result<ExpertsPlan> {
        let (device, s, design) = (&*norms.model.device, norms.s, &norms.model.config.design);
        let x = if norm.is_some() { &s.normed } else { &s.x };
        let gated = match design.experts.and_then(|spec| spec.swiglu) {
            Some(clamped) => Gated::Clamped { alpha: clamped.alpha, limit: clamped.limit },
            None => Gated::By(norms.activation()),
        };
        let Scratch { routes, gated: inner, .. } = s;
        let count = experts.routing.experts();
        let gate_up = ExpertRows { matrix: &experts.gate_up, bias: experts.gate_up_bias.as_ref(), count };
        let down = ExpertRows { matrix: &experts.down, bias: experts.down_bias.as_ref(), count };
        Ok(ExpertsPlan {
            norm: norm.map(|norm| norms.before(norm)).transpose()?,
            route: Route::plan(device, experts.routing, [&experts.router, x], experts.router_bias.as_ref(), routes)?,
            gate_up: Experts::plan(device, gate_up, [x, routes, inner], Ends::Gated(gated))?,
            down: Experts::plan(device, down, [inner, routes, &s.x], Ends::Summed(design.residual_scale))?,
        })
    }

    pub fn record(&self, pass: &mut Pass, tokens: u32) {
        self.norm.iter().for_each(|norm| norm.record(pass, tokens));
        self.route.record(pass, tokens);
        self.gate_up.record(pass, tokens);
        self.down.record(pass, tokens);
    }
}
