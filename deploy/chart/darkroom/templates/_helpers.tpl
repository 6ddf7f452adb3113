{{/* Names and labels */}}

{{- define "darkroom.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 28 | trimSuffix "-" -}}
{{- end -}}

{{- define "darkroom.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 28 | trimSuffix "-" -}}
{{- else if contains (include "darkroom.name" .) .Release.Name -}}
{{- .Release.Name | trunc 28 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "darkroom.name" .) | trunc 28 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/*
What all objects of this release have in common, and what selects its pods: a dict of root, component, set. Names may be
all digits, and unquoted would be numbers.
*/}}
{{- define "darkroom.selector" -}}
app.kubernetes.io/name: {{ include "darkroom.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .set }}
darkroom/worker-set: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "darkroom.labels" -}}
{{ include "darkroom.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image: a dict of root and name */}}
{{- define "darkroom.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ . | trimSuffix "/" }}/{{ end }}{{ .name }}:{{ $image.tag | default .root.Chart.AppVersion -}}
{{- end -}}

{{- define "darkroom.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/*
A worker set with its defaults: a dict of root and set. Written out, since sprig's mergeOverwrite takes nothing that is
empty: `min: 0` would be lost.
*/}}
{{- define "darkroom.workerSet" -}}
{{- $merged := deepCopy .root.Values.workerDefaults -}}
{{- range $key, $value := .set -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $merged $key)) -}}
{{- range $inner, $one := $value -}}{{- $_ := set (get $merged $key) $inner $one -}}{{- end -}}
{{- else -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- end -}}
{{- if and $merged.enabled (not $merged.models) -}}
{{- fail (printf "workers.%s.models is empty: name at least one model, such as {name: demo}" .name) -}}
{{- end -}}
{{- toYaml $merged -}}
{{- end -}}

{{/* DARKROOM_MODELS of a list of models */}}
{{- define "darkroom.models" -}}
{{- $parts := list -}}
{{- range . -}}
{{- $name := .name -}}
{{- if .variant }}{{ $name = printf "%s:%s" .name .variant }}{{ end -}}
{{- $parts = append $parts (ternary (printf "%s=%s" $name (.path | default "")) .name (not (empty .path))) -}}
{{- end -}}
{{- join "," $parts -}}
{{- end -}}

{{/* Whether a worker set reads from /models */}}
{{- define "darkroom.needsWeights" -}}
{{- if .fetch }}yes{{ end -}}
{{- range .models }}{{ if hasPrefix "/models/" (.path | default "") }}yes{{ end }}{{ end -}}
{{- end -}}

{{/* Pods: nobody's root, nothing to write but what is mounted, no token unless said */}}

{{- define "darkroom.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "darkroom.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Where Redis is */}}

{{- define "darkroom.redisEnv" -}}
{{- if .Values.redis.existingSecret -}}
- name: DARKROOM_REDIS_URL_FILE
  value: /run/secrets/darkroom/redis-url
{{- else if .Values.redis.enabled -}}
- name: DARKROOM_REDIS_URL
  value: redis://{{ include "darkroom.fullname" . }}-redis:6379/0
{{- else -}}
{{- fail "redis.existingSecret is empty: name a Secret that holds the url of your Redis under the key redis-url, or say redis.enabled=true for one of the chart's own" -}}
{{- end -}}
{{- end -}}

{{/* What urls in answers begin with; empty: as the request was addressed */}}
{{- define "darkroom.publicUrl" -}}
{{- if .Values.gateway.publicUrl -}}
{{- .Values.gateway.publicUrl -}}
{{- else if and .Values.ingress.enabled .Values.ingress.host -}}
{{- ternary "https" "http" (not (empty .Values.ingress.tlsSecret)) }}://{{ .Values.ingress.host -}}
{{- end -}}
{{- end -}}

{{/* Where pictures are */}}

{{- define "darkroom.storeEnv" -}}
{{- $s3 := .Values.store.s3 -}}
{{- if $s3.bucket -}}
- name: DARKROOM_S3_BUCKET
  value: {{ $s3.bucket | quote }}
- name: DARKROOM_S3_REGION
  value: {{ $s3.region | quote }}
- name: DARKROOM_S3_PRESIGN
  value: {{ ternary "yes" "no" $s3.presign | quote }}
- name: DARKROOM_S3_SWEEP
  value: {{ ternary "yes" "no" $s3.sweep | quote }}
{{- with $s3.prefix }}
- name: DARKROOM_S3_PREFIX
  value: {{ . | quote }}
{{- end }}
{{- with $s3.endpoint }}
- name: DARKROOM_S3_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with $s3.pathStyle }}
- name: DARKROOM_S3_PATH_STYLE
  value: {{ . | quote }}
{{- end }}
{{- with $s3.publicEndpoint }}
- name: DARKROOM_S3_PUBLIC_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if $s3.existingSecret }}
- name: DARKROOM_S3_ACCESS_KEY_ID_FILE
  value: /run/secrets/darkroom/access-key-id
- name: DARKROOM_S3_SECRET_ACCESS_KEY_FILE
  value: /run/secrets/darkroom/secret-access-key
{{- end }}
{{- else -}}
- name: DARKROOM_STORE_DIR
  value: /var/lib/darkroom/pictures
{{- end -}}
{{- end -}}

{{/* The port that pods reach S3 at: as said, else of the endpoint's url */}}
{{- define "darkroom.s3Port" -}}
{{- $url := .Values.store.s3.endpoint | default "https://" | urlParse -}}
{{- $port := $url.host | regexFind ":[0-9]+$" | trimPrefix ":" | default (ternary "80" "443" (eq $url.scheme "http")) -}}
{{- .Values.networkPolicy.s3To.port | default $port -}}
{{- end -}}

{{/* A dict of root and store, which says whether the pod opens the store */}}
{{- define "darkroom.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if include "darkroom.secretSources" . }}
- name: secrets
  mountPath: /run/secrets/darkroom
  readOnly: true
{{- end }}
{{- if and .store (not .root.Values.store.s3.bucket) }}
- name: pictures
  mountPath: /var/lib/darkroom/pictures
{{- end }}
{{- end -}}

{{/* The same, and tmpSize */}}
{{- define "darkroom.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .tmpSize | default "256Mi" }}
{{- with include "darkroom.secretSources" . }}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- . | nindent 6 }}
{{- end }}
{{- if and .store (not .root.Values.store.s3.bucket) }}
- name: pictures
  persistentVolumeClaim:
    claimName: {{ .root.Values.store.volume.existingClaim | default (printf "%s-pictures" (include "darkroom.fullname" .root)) }}
{{- end }}
{{- end -}}

{{- define "darkroom.secretSources" -}}
{{- $redis := .root.Values.redis -}}
{{- $s3 := .root.Values.store.s3 -}}
{{- if $redis.existingSecret -}}
- secret:
    name: {{ $redis.existingSecret }}
    items:
      - {key: {{ $redis.urlKey }}, path: redis-url}
{{- end }}
{{- if and .store $s3.bucket $s3.existingSecret }}
- secret:
    name: {{ $s3.existingSecret }}
    items:
      - {key: access-key-id, path: access-key-id}
      - {key: secret-access-key, path: secret-access-key}
{{- end }}
{{- end -}}

{{- define "darkroom.settingsFrom" -}}
{{- if .Values.settings -}}
envFrom:
  - configMapRef:
      name: {{ include "darkroom.fullname" . }}-settings
{{- end -}}
{{- end -}}

{{/* New settings are new pods */}}
{{- define "darkroom.podAnnotations" -}}
{{- if .root.Values.settings }}
darkroom/settings: {{ toYaml .root.Values.settings | sha256sum | trunc 16 | quote }}
{{- end }}
{{- with .annotations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Where pods go: a dict of root and spec; spread says to keep them apart. A volume for one node keeps them together. */}}
{{- define "darkroom.placement" -}}
{{- $together := and (not .root.Values.store.s3.bucket) (eq .root.Values.store.volume.accessMode "ReadWriteOnce") -}}
{{- with .spec.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .spec.affinity }}
affinity:
  {{- toYaml .spec.affinity | nindent 2 }}
{{- else if and $together .store }}
affinity:
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "darkroom.selector" (dict "root" .root) | nindent 12 }}
            darkroom/opens-store: "yes"
{{- else if .component }}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "darkroom.selector" (dict "root" $.root "component" $.component) | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Bytes of a quantity of memory, as Redis or Kubernetes writes it; nothing for what is neither */}}
{{- define "darkroom.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "kb" 1024 "mb" 1048576 "gb" 1073741824 -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[A-Za-z]*$" $text -}}
{{- $number := trimSuffix $unit $text -}}
{{- if and (regexMatch "^[0-9]+(\\.[0-9]+)?$" $number) (hasKey $units $unit) -}}
{{- mulf (float64 $number) (get $units $unit) | printf "%.0f" -}}
{{- end -}}
{{- end -}}
