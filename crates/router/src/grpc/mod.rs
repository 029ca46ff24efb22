//! The gRPC doors: `tramontane.v1.Inference` and the Open Inference Protocol for clients, with the same requests, limits
//! and errors as over HTTP, and `Admin` for operators at a port of its own. Health and reflection at both.

mod admin;
mod call_name;
mod conversation;
mod deadline;
mod inference;
mod messages;
mod open_inference;
mod parts;
mod status;

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Request;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::HealthReporter;
use tonic_reflection::server::{v1, v1alpha};
use tramontane_proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use tramontane_proto::v1::admin_server::AdminServer;
use tramontane_proto::v1::inference_server::InferenceServer;
use tramontane_runtime::Readiness;
use tramontane_runtime::tls::{Guard as RoleGuard, Incoming};

use messages::{HEALTH_BYTES_MAX, REFLECTION_BYTES_MAX, Reader, Room};
use parts::Shapes;

pub(crate) use inference::generation_request;
pub(crate) use open_inference::completion;
pub(crate) use status::refusal;

use crate::Error;
use crate::admission::Arrival;
use crate::answer::Answer;
use crate::answer_id::AnswerId;
use crate::auth::{Door, Guard, guard};
use crate::constraint;
use crate::dispatch::Name;
use crate::error::ApiError;
use crate::http_server::{self, Versions};
use crate::request::PreparedRequest;
use crate::request_id::RequestId;
use crate::run::{App, Doors};
use crate::tenants::Caller;

/// Services that health and reflection name at each door.
const CLIENTS: &[&str] = &["tramontane.v1.Inference", "inference.GRPCInferenceService"];
const OPERATORS: &[&str] = &["tramontane.v1.Admin"];
const HEALTH: &str = "grpc.health.v1.Health";

/// What the health of a door follows.
#[derive(Debug)]
pub(crate) struct Health<'a> {
    ready: Readiness,
    tasks: &'a TaskTracker,
    stop: &'a CancellationToken,
}

/// Serves clients until `doors.refuse`, and then until every call has ended.
pub(crate) fn serve(
    incoming: Incoming,
    app: &Arc<App>,
    doors: Doors,
    health: &Health<'_>,
) -> Result<impl Future<Output = ()> + use<>, Error> {
    let message_bytes_max = app.config.body_bytes_max;
    let inference = InferenceServer::new(inference::InferenceService::new(Arc::clone(app)))
        .max_decoding_message_size(message_bytes_max);
    let open_inference = open_inference::OpenInferenceService::new(Arc::clone(app));
    let open_inference = GrpcInferenceServiceServer::new(open_inference)
        .max_decoding_message_size(message_bytes_max);
    let (reflection_v1, reflection_v1alpha) = reflection(CLIENTS).map_err(Error::Reflection)?;
    let routes = Routes::new(inference)
        .add_service(open_inference)
        .add_service(health.serve(CLIENTS))
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha);
    let routes = named(proven(read_first(routes, app)?, app));
    Ok(http_server::serve(
        incoming,
        (routes, Versions::Http2),
        doors,
    ))
}

/// Serves operators, likewise. `roles` checks their certificates; without any they prove who they are as clients do.
pub(crate) fn serve_admin(
    incoming: Incoming,
    app: &Arc<App>,
    roles: Option<&RoleGuard>,
    doors: Doors,
    health: &Health<'_>,
) -> Result<impl Future<Output = ()> + use<>, Error> {
    let admin = AdminServer::new(admin::AdminService::new(Arc::clone(app)))
        .max_decoding_message_size(app.config.body_bytes_max);
    let (reflection_v1, reflection_v1alpha) = reflection(OPERATORS).map_err(Error::Reflection)?;
    let health = health.serve(OPERATORS);
    let routes = match roles {
        Some(roles) => {
            let routes = Routes::new(roles.before(admin))
                .add_service(roles.before(health))
                .add_service(roles.before(reflection_v1))
                .add_service(roles.before(reflection_v1alpha));
            read_first(routes, app)?
        }
        None => {
            let routes = Routes::new(admin)
                .add_service(health)
                .add_service(reflection_v1)
                .add_service(reflection_v1alpha);
            proven(read_first(routes, app)?, app)
        }
    };
    let routes = named(routes);
    Ok(http_server::serve(
        incoming,
        (routes, Versions::Http2),
        doors,
    ))
}

/// The same services behind the layer that reads a call's message within its limits.
fn read_first(routes: Routes, app: &Arc<App>) -> Result<Router, Error> {
    let descriptors = [
        tramontane_proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
    ];
    let shapes = Shapes::new(&descriptors).map_err(Error::Descriptors)?;
    let reader = Reader::new(Arc::clone(app), shapes);
    let reading = from_fn_with_state(reader, messages::read);
    Ok(routes.into_axum_router().layer(reading))
}

/// The same services, and methods that do not exist, behind the layer that asks who calls.
fn proven(routes: Router, app: &App) -> Router {
    let guarded = from_fn_with_state(Guard::new(Door::Grpc, app), guard);
    routes.layer(guarded)
}

/// The same services behind the layer that gives every call a name.
fn named(routes: Router) -> Router {
    routes.layer(from_fn(call_name::name_call))
}

/// Who calls: of the layer around all methods, without which nobody has asked.
fn caller<T>(request: &Request<T>) -> Result<Caller, ApiError> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(ApiError::internal)
}

/// A call that is not understood yet.
struct Arrived {
    id: RequestId,
    caller: Caller,
    arrival: Arrival,
    room: Option<Room>,
}

/// Who calls, the place of its request among those that are not understood yet, and the memory of its message.
fn arrived<T>(app: &App, request: &Request<T>) -> Result<Arrived, ApiError> {
    let caller = caller(request)?;
    let id = request.extensions().get::<RequestId>().copied();
    let id = id.ok_or_else(ApiError::internal)?;
    app.dispatcher.knock(&caller)?;
    let arrival = app.dispatcher.arrive(&caller)?;
    Ok(Arrived {
        id,
        caller,
        arrival,
        room: Room::of(request),
    })
}

/// Starts what a call asks for. `read` makes the request of the answer with this name, where that holds up nobody;
/// `in_constraint` says in which field of the message a constraint is that nobody can follow.
async fn start(
    app: &App,
    arrived: Arrived,
    read: impl FnOnce(AnswerId) -> Result<PreparedRequest, ApiError> + Send + 'static,
    in_constraint: fn(ApiError) -> ApiError,
) -> Result<Answer, ApiError> {
    let answer = arrived.id.answer();
    let room = arrived.room;
    let tenant = &arrived.caller.tenant;
    let prepared = app.dispatcher.prepare(tenant, move || {
        // Until the message has become token ids.
        let _room = room;
        read(answer)
    });
    let prepared = prepared.await?;
    let checked = constraint::check(app, &arrived.caller.tenant, &prepared).await;
    checked.map_err(in_constraint)?;
    let name = Name {
        request: arrived.id.to_string(),
        answer,
        version: None,
        caller: arrived.caller,
        arrival: Some(arrived.arrival),
    };
    app.dispatcher.start(prepared, name).await
}

/// Both versions of the reflection service of a door.
fn reflection(
    services: &[&str],
) -> Result<
    (
        v1::ServerReflectionServer<impl v1::ServerReflection>,
        v1alpha::ServerReflectionServer<impl v1alpha::ServerReflection>,
    ),
    tonic_reflection::server::Error,
> {
    let names = || {
        let mut builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tramontane_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(HEALTH);
        for service in services {
            builder = builder.with_service_name(*service);
        }
        builder
    };
    let (current, alpha) = (names().build_v1()?, names().build_v1alpha()?);
    Ok((
        current.max_decoding_message_size(REFLECTION_BYTES_MAX),
        alpha.max_decoding_message_size(REFLECTION_BYTES_MAX),
    ))
}

impl<'a> Health<'a> {
    pub(crate) fn new(app: &App, tasks: &'a TaskTracker, stop: &'a CancellationToken) -> Self {
        let ready = app.ready.clone();
        Self { ready, tasks, stop }
    }

    /// The health service of the door of `services`.
    fn serve(
        &self,
        services: &'static [&'static str],
    ) -> HealthServer<impl tonic_health::pb::health_server::Health> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let (ready, stop) = (self.ready.clone(), self.stop.clone());
        self.tasks
            .spawn(keep_health(reporter, services, ready, stop));
        health.max_decoding_message_size(HEALTH_BYTES_MAX)
    }
}

/// Keeps the health service true to readiness until `stop`. Liveness is that it answers.
async fn keep_health(
    reporter: HealthReporter,
    services: &'static [&'static str],
    mut ready: Readiness,
    stop: CancellationToken,
) {
    loop {
        let is_ready = ready.check().is_ok();
        for name in ["", "readiness", "liveness"].iter().chain(services) {
            let serves = is_ready || *name == "liveness";
            let status = if serves {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            };
            reporter.set_service_status(*name, status).await;
        }
        tokio::select! {
            changed = ready.changed() => if !changed { return },
            () = stop.cancelled() => return,
        }
    }
}
