//! Who of the cluster may call what. One table; what is not in it, nobody may call. A door in the clear has no names to
//! go by, and checks nothing.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;

use super::incoming::PeerInfo;
use super::name::{PeerName, Role};
use super::quiet::Quiet;

/// Methods, or services that end with a slash, and the roles that may call them. The first that fits counts.
const TABLE: [(&str, &[Role]); 10] = [
    ("/tramontane.v1.Worker/Generate", &[Role::Router]),
    ("/tramontane.v1.Worker/Status", &[Role::Router]),
    (
        "/tramontane.v1.Worker/Drain",
        &[Role::Router, Role::Operator],
    ),
    (
        "/tramontane.v1.Worker/Drill",
        &[Role::Router, Role::Operator],
    ),
    ("/tramontane.v1.ExpertExchange/", &[Role::Worker]),
    ("/tramontane.v1.Weights/", &[Role::Worker]),
    ("/tramontane.v1.Island/", &[Role::Worker]),
    ("/tramontane.v1.Admin/", &[Role::Operator]),
    ("/grpc.health.v1.Health/", &Role::ALL),
    // Both versions of it.
    ("/grpc.reflection.v1", &Role::ALL),
];

/// Roles that may call `path`; none when it is not in the table.
fn roles(path: &str) -> &'static [Role] {
    let fits = |entry: &str| match entry.ends_with('/') || entry.ends_with(".v1") {
        true => path.starts_with(entry),
        false => path == entry,
    };
    let found = TABLE.iter().find(|(entry, _)| fits(entry));
    found.map_or(&[], |(_, roles)| *roles)
}

/// Puts checks before services.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    cluster: Option<Arc<str>>,
    quiet: Arc<Mutex<Quiet>>,
}

impl Guard {
    /// Callers must be of this cluster.
    pub(super) fn of(cluster: &str) -> Self {
        Self {
            cluster: Some(cluster.into()),
            quiet: Arc::default(),
        }
    }

    /// `service`, for those who may call it.
    pub fn before<S>(&self, service: S) -> Guarded<S> {
        let guard = self.clone();
        Guarded { service, guard }
    }

    fn check(&self, path: &str, peer: Option<&PeerInfo>) -> Result<(), String> {
        let Some(cluster) = &self.cluster else {
            return Ok(());
        };
        let name = peer.and_then(|peer| peer.name.as_deref());
        let got = match name {
            Some(Ok(name)) => name,
            Some(Err(bad)) => return Err(format!("{path}: the certificate {bad}")),
            None => return Err(format!("{path}: expected a client certificate, got none")),
        };
        let allowed = roles(path);
        if got.cluster == **cluster && allowed.contains(&got.role) {
            return Ok(());
        }
        let names = allowed
            .iter()
            .map(|role| PeerName::new(cluster, *role).to_string());
        let expected = match allowed {
            [] => "nobody".to_owned(),
            _ => names.collect::<Vec<_>>().join(" or "),
        };
        Err(format!("{path} is for {expected}, got {got}"))
    }

    fn report(&self, peer: Option<&PeerInfo>, why: &str) {
        let unsaid = self.quiet.lock().may_speak();
        if let Some(unsaid) = unsaid {
            let peer = peer.and_then(|peer| peer.address);
            tracing::warn!(?peer, why, unsaid, "call refused");
        }
    }
}

/// A service behind a [`Guard`].
#[derive(Clone, Debug)]
pub struct Guarded<S> {
    service: S,
    guard: Guard,
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<PeerInfo>();
        match self.guard.check(request.uri().path(), peer) {
            Ok(()) => Box::pin(self.service.call(request)),
            Err(why) => {
                self.guard.report(peer, &why);
                let refused = Status::permission_denied(why).into_http();
                Box::pin(std::future::ready(Ok(refused)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::name::BadName;
    use super::*;

    /// Every definition of a service between processes.
    const PROTOS: [&str; 5] = [
        include_str!("../../../../proto/tramontane/v1/admin.proto"),
        include_str!("../../../../proto/tramontane/v1/expert.proto"),
        include_str!("../../../../proto/tramontane/v1/island.proto"),
        include_str!("../../../../proto/tramontane/v1/weights.proto"),
        include_str!("../../../../proto/tramontane/v1/worker.proto"),
    ];

    fn peer(name: Result<PeerName, BadName>) -> PeerInfo {
        PeerInfo {
            address: None,
            name: Some(Arc::new(name)),
        }
    }

    /// `service` and `rpc` lines of a definition as paths.
    fn methods(proto: &str) -> Vec<String> {
        let mut service = "";
        let mut found = Vec::new();
        for line in proto.lines() {
            if let Some(rest) = line.strip_prefix("service ") {
                service = rest.trim_end_matches(" {");
            }
            if let Some(rest) = line.trim().strip_prefix("rpc ") {
                let method = rest.split('(').next().unwrap();
                found.push(format!("/tramontane.v1.{service}/{method}"));
            }
        }
        found
    }

    #[test]
    fn every_method_between_processes_is_for_somebody_and_for_nobody_else() {
        let guard = Guard::of("prod");
        let methods: Vec<String> = PROTOS.iter().flat_map(|proto| methods(proto)).collect();
        assert!(methods.len() > 20, "{methods:?}");
        for path in methods {
            let allowed = roles(&path);
            assert!(!allowed.is_empty() && allowed.len() < 3, "{path}");
            for role in Role::ALL {
                let may =
                    |cluster| guard.check(&path, Some(&peer(Ok(PeerName::new(cluster, role)))));
                assert_eq!(
                    may("prod").is_ok(),
                    allowed.contains(&role),
                    "{path} {role}"
                );
                assert!(may("test").is_err(), "{path} {role}");
            }
        }
        let may = |path| guard.check(path, Some(&peer(Ok(PeerName::new("prod", Role::Worker)))));
        assert!(may("/grpc.health.v1.Health/Check").is_ok());
        assert!(may("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo").is_ok());
        assert!(may("/tramontane.v1.Worker/Forget").is_err());
        assert!(may("/tramontane.v1.Worker/Generate/").is_err());
    }

    #[test]
    fn a_refusal_says_what_was_expected_and_what_came() {
        let guard = Guard::of("prod");
        let path = "/tramontane.v1.Worker/Drain";
        let refused = |name| guard.check(path, Some(&peer(name))).unwrap_err();
        assert_eq!(
            refused(Ok(PeerName::new("prod", Role::Worker))),
            "/tramontane.v1.Worker/Drain is for spiffe://prod/router or spiffe://prod/operator, got spiffe://prod/worker"
        );
        assert!(refused(Err(BadName::Missing)).contains("has no URI spiffe://"));
        assert!(guard.check(path, None).unwrap_err().contains("got none"));
        assert!(Guard::default().check(path, None).is_ok());
    }
}
