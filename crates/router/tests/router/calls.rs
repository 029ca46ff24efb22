//! The same answers and refusals over gRPC, and what its clients find there.

use super::*;

#[tokio::test]
async fn grpc_gives_the_same_answers() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let options = v1::GenerateOptions {
        n: Some(2),
        logprobs: Some(1),
        ..Default::default()
    };
    let stream = client.generate(plain(options)).await.unwrap().into_inner();
    let messages: Vec<v1::GenerateResponse> = stream.map(Result::unwrap).collect().await;
    for index in 0..2 {
        let of_one = || messages.iter().filter(move |m| m.index == index);
        let text: String = of_one().map(|m| m.text.as_str()).collect();
        assert!(text.ends_with(TEXT));
        let ids: Vec<u32> = of_one()
            .flat_map(|m| m.tokens.iter().map(|t| t.id))
            .collect();
        assert_eq!(ids, story(&scene.tokenizer));
        assert_eq!(of_one().filter(|m| m.finish_reason.is_some()).count(), 1);
    }
    let with_usage: Vec<usize> = (0..messages.len())
        .filter(|&i| messages[i].usage.is_some())
        .collect();
    assert_eq!(with_usage, [messages.len() - 1]);
    let once = client
        .generate_once(plain(v1::GenerateOptions::default()))
        .await
        .unwrap()
        .into_inner();
    assert!(once.answers[0].text.ends_with(TEXT));
    assert_eq!(
        once.usage.unwrap().completion_tokens as usize,
        story(&scene.tokenizer).len()
    );

    scene.end().await;
}

#[tokio::test]
async fn grpc_refuses_what_http_refuses_and_says_where() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    for (options, field) in [
        (
            v1::GenerateOptions {
                temperature: Some(f32::NAN),
                ..Default::default()
            },
            "options.temperature",
        ),
        (
            v1::GenerateOptions {
                top_p: Some(f32::INFINITY),
                ..Default::default()
            },
            "options.top_p",
        ),
        (
            v1::GenerateOptions {
                n: Some(1000),
                ..Default::default()
            },
            "options.n",
        ),
        (
            v1::GenerateOptions {
                max_tokens: Some(5000),
                ..Default::default()
            },
            "options.max_tokens",
        ),
        (
            v1::GenerateOptions {
                stop: vec![String::new()],
                ..Default::default()
            },
            "options.stop",
        ),
        (
            v1::GenerateOptions {
                prompt_logprobs: Some(1),
                ..Default::default()
            },
            "options.prompt_logprobs",
        ),
    ] {
        let refused = client.generate(plain(options)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{field}");
        let details = refused.get_error_details();
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            field
        );
        assert_eq!(details.error_info().unwrap().domain, "tramontane");
    }
    let nothing = client
        .generate_once(v1::GenerateRequest::default())
        .await
        .unwrap_err();
    assert_eq!(nothing.code(), tonic::Code::InvalidArgument);

    assert!(scene.workers[0].seen.lock().is_empty());
    scene.end().await;
}

#[tokio::test]
async fn grpc_tokenizes_and_lists_models() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let ids = client
        .tokenize(v1::TokenizeRequest {
            text: TEXT.to_owned(),
            add_bos: false,
        })
        .await;
    let ids = ids.unwrap().into_inner().ids;
    assert_eq!(ids, scene.tokenizer.encode(TEXT).unwrap());
    let text = client
        .detokenize(v1::DetokenizeRequest { ids })
        .await
        .unwrap()
        .into_inner()
        .text;
    assert_eq!(text, TEXT);
    let models = client
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!(
        (models[0].id.as_str(), models[0].context_length),
        ("demo", 2048)
    );
    scene.end().await;
}

#[tokio::test]
async fn reflection_lists_the_services_in_both_versions() {
    use tonic_reflection::pb::{v1 as new, v1alpha as old};
    let scene = Scene::start(config(), vec![storyteller()]).await;
    for (url, served, elsewhere) in [
        (
            &scene.grpc,
            "tramontane.v1.Inference",
            "tramontane.v1.Admin",
        ),
        (
            &scene.admin,
            "tramontane.v1.Admin",
            "tramontane.v1.Inference",
        ),
    ] {
        let channel = channel(url).await;
        let ask = new::server_reflection_request::MessageRequest::ListServices(String::new());
        let request = new::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(ask),
        };
        let mut client =
            new::server_reflection_client::ServerReflectionClient::new(channel.clone());
        let answer = client
            .server_reflection_info(futures::stream::iter([request]))
            .await
            .unwrap();
        let answer = answer.into_inner().next().await.unwrap().unwrap();
        let answer = answer.message_response.unwrap();
        let new::server_reflection_response::MessageResponse::ListServicesResponse(list) = answer
        else {
            panic!("a list expected")
        };
        let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
        assert!(names.contains(&served) && names.contains(&"grpc.health.v1.Health"));
        assert!(!names.contains(&elsewhere), "{names:?}");
        let ask = old::server_reflection_request::MessageRequest::ListServices(String::new());
        let request = old::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(ask),
        };
        let mut client = old::server_reflection_client::ServerReflectionClient::new(channel);
        let answer = client
            .server_reflection_info(futures::stream::iter([request]))
            .await
            .unwrap();
        assert!(answer.into_inner().next().await.unwrap().is_ok());
    }
    let mut outside = AdminClient::new(channel(&scene.grpc).await);
    let asked = outside.cluster_status(v1::ClusterStatusRequest {}).await;
    assert_eq!(asked.unwrap_err().code(), tonic::Code::Unimplemented);
    scene.end().await;
}
